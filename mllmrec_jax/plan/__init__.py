"""`mllmrec plan`: which mesh, micro-batch and rematerialisation fit, and how long a step should take, from shapes alone."""
