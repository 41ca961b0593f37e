"""The whole mesh in one process, in virtual time: the real code, with modelled machines and wires.

Knows: how long things take, when they break, and what is counted.
Does not know: how a mesh decides, routes, recovers or agrees. That is the code of the other
folders, which runs here unchanged. Start reading at `world.py`; the clock is in `loop.py`.
"""
