"""One line of the table: what is required, what was measured, and what to look at where it was missed."""

from typing import NamedTuple


class Figure(NamedTuple):
    """Where ``required`` is empty the figure is for information."""

    name: str
    required: str
    measured: str
    met: bool
    failures: list[str]


def show(figure: Figure) -> None:
    verdict = ("ok" if figure.met else "MISSED") if figure.required else ""
    print(f"{figure.name:<84} {figure.required:<16} {figure.measured:<24} {verdict}")
    for line in figure.failures:
        print(f"    {line}")
    print(end="", flush=True)


def numbers(values) -> str:
    return "[" + ", ".join(f"{value:.11g}" for value in values) + "]"
