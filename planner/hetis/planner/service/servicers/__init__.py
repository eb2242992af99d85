"""One servicer per service of the API, which translates messages and makes one call. `service.assembly` lists them."""
