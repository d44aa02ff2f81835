"""Training of the adapter that lets a model draft for itself. Serving never imports this."""
