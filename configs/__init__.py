"""What a run is told: dataclasses, presets, and how they are loaded."""
