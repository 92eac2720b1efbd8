"""What papers report of their methods, beside what the same methods do here."""
