"""What to try, who tries it, what won. The top of the graph: nobody imports it."""
