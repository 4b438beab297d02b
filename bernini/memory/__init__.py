"""The whole pipeline within a stated amount of memory: what stays loaded, what comes for its stage, what streams."""
