"""Shared by the commands. Imported before torch, which reads the environment variables that are set here."""
import os

# By default a thread of OpenMP that waits spins for several milliseconds. That is longer than the system lets a thread
# run while other programs are busy, so it takes the CPU from the thread that it waits for. A third of it costs nothing
# on an idle machine, where OMP_WAIT_POLICY=PASSIVE makes a step a quarter slower.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
