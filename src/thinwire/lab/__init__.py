"""The lab: an emulated cluster on one Linux machine. Hosts are network namespaces, links have a rate, faults are data."""
