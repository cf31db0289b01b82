"""What tests share: inputs, models to compare with, stand-ins for devices, scripts."""
