"""Plans as one page of HTML that needs no network: values to blocks, blocks to a template."""
