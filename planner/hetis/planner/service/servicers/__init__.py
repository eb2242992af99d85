"""One servicer per service of the contract: message in, one call, message out. `service.assembly` lists them."""
