"""`hardware` and `shutdown`."""

from __future__ import annotations

from wingman.commands.api import ask, read_as
from wingman.commands.output import size_text
from wingman.commands.session import Session
from wingman.services.hardware import Gpu, HardwareInfo


def hardware_command(session: Session) -> int:
    """`wingman hardware`."""
    hardware = ask(session.api(), "/api/hardware")
    if session.output.is_json:
        session.output.document(hardware)
        return 0
    for title, text in describe(read_as(hardware, HardwareInfo)):
        session.output.line(f"{title:<8}{text}")
    return 0


def shutdown_command(session: Session) -> int:
    """`wingman shutdown`."""
    answer = ask(session.daemon(), "/api/shutdown", "POST")
    if session.output.is_json:
        session.output.document(answer)
    session.output.line("the server is shutting down")
    return 0


def describe(machine: HardwareInfo) -> list[tuple[str, str]]:
    """Titles and texts of what the machine has."""
    cpu, disk, system, llama = machine.cpu, machine.disk, machine.os, machine.llama
    cores = f"{cpu.physical_cores} cores, {cpu.logical_cores} logical, {cpu.load_percent:.0f}% busy"
    gpus = [("gpu", _gpu_text(gpu)) for gpu in machine.gpu.gpus] or [("gpu", "none")]
    rows = [
        *gpus,
        ("cpu", ", ".join(filter(None, (cpu.name, cores)))),
        ("memory", _room(cpu.free_memory_mb, cpu.total_memory_mb)),
        ("disk", _room(disk.free_mb, disk.total_mb)),
        ("os", " ".join(filter(None, (system.name, system.release, system.machine)))),
        ("llama", " ".join(filter(None, (llama.build, llama.system_info)))),
    ]
    return [(title, text) for title, text in rows if text]


def _gpu_text(gpu: Gpu) -> str:
    use = f"{gpu.utilization_percent}% busy, {gpu.temperature_c} \u00b0C"
    driver = f"driver {gpu.driver}" if gpu.driver else ""
    return ", ".join(filter(None, (gpu.name, _room(gpu.free_memory_mb, gpu.total_memory_mb), use, driver)))


def _room(free_mb: int, total_mb: int) -> str:
    return f"{size_text(free_mb * 2**20) or '0 B'} of {size_text(total_mb * 2**20)} free" if total_mb else ""
