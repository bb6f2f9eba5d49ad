"""``lowvram doctor``: what this machine has, what a run expects of it, what to set and why.

``probes`` names what can be asked of a machine and ``machine`` asks the one at hand; ``software``, ``cards``,
``memory`` and ``ranks`` judge the answers; ``examine`` puts them in order.
"""
