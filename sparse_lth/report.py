def write_page(*a):
    pass


def print_tables(console, ticket, comparison):
    print(comparison)
