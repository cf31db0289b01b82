"""The main job: train a GINO on groundwater patches, simulated with MODFLOW 6."""
