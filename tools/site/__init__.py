"""What the site adds to MkDocs: formulas, tables of data, and links that leave the pages."""
