"""Programs that build the shipped catalogue, profiles and efficiencies, and the pages about them."""
