"""What downloaded models are called: every name means one file, or none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wingman.services.items import DownloadItem
from wingman.services.modelnames import find_download, model_name, names_of


def here(repo: str, path: str, status: str = "complete") -> DownloadItem:
    return DownloadItem(model_repo=repo, file_path=path, status=status)  # type: ignore[arg-type]


TINY4 = here("o/Tiny-GGUF", "Tiny.Q4_K_M.gguf")
TINY8 = here("o/Tiny-GGUF", "Tiny.Q8_0.gguf")
COPY8 = here("p/Copy-GGUF", "sub/Tiny.Q8_0.gguf")
PLAIN = here("q/Plain", "plain.gguf")
SPLIT = here("r/Big-GGUF", "Big.Q2_K-00001-of-00003.gguf")
COMING = here("s/Coming-GGUF", "coming.Q4_0.gguf", "downloading")
ALL = [TINY4, TINY8, COPY8, PLAIN, SPLIT, COMING]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Tiny.Q4_K_M", TINY4),
        ("Tiny.Q4_K_M.gguf", TINY4),
        ("tiny.q4_k_m", TINY4),
        ("o/Tiny-GGUF:Q4_K_M", TINY4),
        ("o/Tiny-GGUF:q4_k_m", TINY4),
        ("o/Tiny-GGUF:Q8_0", TINY8),
        ("o/Tiny-GGUF/Tiny.Q8_0.gguf", TINY8),
        ("o/Tiny-GGUF", None),  # two files
        ("Tiny.Q8_0", None),  # of two repositories
        ("p/Copy-GGUF", COPY8),
        ("p/Copy-GGUF:Q8_0", COPY8),
        ("p/Copy-GGUF/sub/Tiny.Q8_0.gguf", COPY8),
        ("q/Plain", PLAIN),
        ("q/Plain:", None),
        ("plain", PLAIN),
        ("Big.Q2_K-00001-of-00003", SPLIT),
        ("r/Big-GGUF:Q2_K", SPLIT),
        ("s/Coming-GGUF", None),
        ("coming.Q4_0", None),
        ("Tiny", None),
        ("", None),
        ("../Tiny.Q8_0.gguf", None),
    ],
)
def test_a_name_means_one_file(name: str, found: DownloadItem | None) -> None:
    assert find_download(name, ALL) == found


def test_of_names_that_differ_in_case_the_one_as_written_is_meant() -> None:
    upper, lower = here("o/r", "A.gguf"), here("o/s", "a.gguf")
    assert find_download("A", [upper, lower]) == upper
    assert find_download("a", [upper, lower]) == lower


@pytest.mark.parametrize(
    ("item", "name"),
    [
        (TINY4, "Tiny.Q4_K_M"),
        (TINY8, "o/Tiny-GGUF:Q8_0"),
        (COPY8, "p/Copy-GGUF:Q8_0"),
        (PLAIN, "plain"),
        (SPLIT, "Big.Q2_K-00001-of-00003"),
    ],
)
def test_a_model_goes_by_its_shortest_name_that_no_other_has(item: DownloadItem, name: str) -> None:
    assert model_name(item, ALL) == name


ITEMS = st.lists(
    st.builds(
        here,
        st.sampled_from(["o/r", "O/r", "o/s-GGUF"]),
        st.sampled_from(["a.gguf", "A.gguf", "a.Q4_0.gguf", "a.Q8_0.gguf", "sub/a.gguf", "a-Q4_0.gguf"]),
        st.sampled_from(["complete", "complete", "queued"]),
    ),
    unique_by=lambda item: item.key,
    max_size=8,
)


@given(ITEMS)
def test_whatever_is_there_each_model_is_found_by_the_name_it_goes_by(items: list[DownloadItem]) -> None:
    complete = [item for item in items if item.status == "complete"]
    for item in complete:
        name = model_name(item, items)
        assert name in names_of(item)
        assert find_download(name, items) == item
    assert len({model_name(item, items) for item in complete}) == len(complete)
