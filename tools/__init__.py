"""Programs that build what is shipped and shown: the catalogue, the profiles, the efficiencies, and their pages."""
