"""The catalog: GET /api/models, all of it or one repository (`modelRepo`)."""

from __future__ import annotations

from wingman.http.messages import Request, Response
from wingman.services.catalog import Catalog
from wingman.services.home import check_repo


async def list_models(catalog: Catalog, request: Request) -> Response:
    """Models of the Hub and of the models folder; `stale` is there when the Hub could not be asked."""
    repo_id = request.target.first("modelRepo")
    if repo_id is None:
        return Response(200, await catalog.body())
    return Response(200, await catalog.repo_body(check_repo(repo_id)))
