"""How the policy's parameters are distributed over processes, one file a way; `choice.py` picks one."""
