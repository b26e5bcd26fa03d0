"""The noise process, its schedules and its sampler; the calibration sets C_QC and C_DC that it draws."""
