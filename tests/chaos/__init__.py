"""What does a server that everything befalls do to its requests? See __main__."""
