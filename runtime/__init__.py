"""Executes a stream program with torch: real streams, process groups and the shipped transformer.

``executor`` runs one rank's ops of a :class:`~mhcplan.sim.program.Program` in host issue order,
``binding`` says what each op computes, ``model`` holds the parameters, ``train`` runs, times and
traces whole steps. Needs torch, and Triton on a GPU; nothing of the planner.
"""
