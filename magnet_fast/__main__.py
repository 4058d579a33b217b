"""`python -m magnet_fast` and `torchrun -m magnet_fast`: the command line."""

from magnet_fast.cli import main

if __name__ == "__main__":
    main()
