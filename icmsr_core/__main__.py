"""``python -m icmsr_core`` is the command ``icmsr``."""

from .cli.main import run

if __name__ == "__main__":
    run()
