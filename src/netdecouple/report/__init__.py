"""What was gained and what was lost: data first, and separate printers for it."""
