"""ALFWorld as text games: official games or generated ones, the package's own rules and wording at the speed of plain Python."""
