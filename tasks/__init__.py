"""Between the flows and the core: units that are cached, stages that make them, tracking."""
