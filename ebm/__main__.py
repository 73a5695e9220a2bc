"""`python -m ebm`: see what a file holds, train a model on events, score events with it, see how well it does."""

from ebm.commands import app

from ebm.commands import model, look, report, study, benchmark  # noqa: F401  # isort: skip (the order of --help)

if __name__ == "__main__":
    app(prog_name="python -m ebm")
