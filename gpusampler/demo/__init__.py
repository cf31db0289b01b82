"""The main job: simulate groundwater with MODFLOW 6, train a GINO on its patches."""
