"""The demo: train a GINO on groundwater patches that were simulated with MODFLOW 6."""
