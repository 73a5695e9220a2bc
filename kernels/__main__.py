"""`python -m kernels`: the backends, and why each can or cannot run here."""

from kernels.registry import BACKENDS


def main() -> None:
    """Print one line per backend."""
    from rich.console import Console
    from rich.table import Table

    table = Table("backend", "device", "precision", "what it is", "on this machine", title="fused-ebm backends")
    for b in BACKENDS.values():
        why_not = b.why_not()
        state = "[green]runs[/]" if why_not is None else f"[yellow]no:[/] {why_not}"
        table.add_row(b.name, b.device, ", ".join(b.dtypes), b.about, state)
    Console().print(table)


if __name__ == "__main__":
    main()
