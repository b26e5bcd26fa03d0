"""Pages for people: a run's report in HTML, and a model's card."""
