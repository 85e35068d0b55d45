"""Human review of a round: picks among candidates, blind comparisons, and how far people and rewards agree."""
