"""Methods of continual learning on one stage code: one file each, named like its `method:`."""
