"""The parts of the studio, which `demo.py` opens in a browser."""
