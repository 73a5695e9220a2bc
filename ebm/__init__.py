"""What an event is and what normal means: events, training, thresholds, evaluation."""
