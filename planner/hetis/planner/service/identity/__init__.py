"""Who a caller is, by token or certificate, and what each role may do."""
