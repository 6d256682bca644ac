"""What a recipe needs and costs, computed before anything starts: no Ray, no model, no network."""
