"""The scheduler and the placement under a simulated clock, with simulated servers.

- ``load``: who asks for which model, and when
- ``simulator``: plays a load through a scheduler
- ``servers``: what simulated servers hold, and how long they take to come and go
- ``strategies``: how llama-gpu decides, and two simpler ways
- ``outcome``: what came of it, in numbers
"""
