"""The lottery-ticket driver: finds masks by iterative magnitude pruning and trains what remains with sparse kernels."""

from lth.events import Observer
from lth.ticket import Ticket, Tickets, find_ticket

__all__ = ["Observer", "Ticket", "Tickets", "find_ticket"]
