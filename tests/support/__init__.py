"""What test files share. A test file imports from here, and from no other test file."""
