"""Runs a config: `python train.py --config configs/NAME.py`, the same as `jaxfusion train`."""

from jaxfusion.commands.train import run

if __name__ == "__main__":
    run()
