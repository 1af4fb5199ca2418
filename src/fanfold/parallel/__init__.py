"""One model over several units: what is cut where, and what ranks say to each other."""
