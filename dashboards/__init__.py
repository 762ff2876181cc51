"""Shows studies: in a terminal, as figures in files, and as web pages. It changes no study."""
