"""What builds the documentation's site beside MkDocs: formulas, tables of data, links that leave the pages."""
