"""Orders: shops with price lists, stock and customers' orders that can be placed, read and cancelled."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any
from zlib import crc32

from torchtune_agent.toolworld.tool import Lookup, Pipe, State, Tool, ToolError, Usage, parameters, tidy
from torchtune_agent.toolworld.words import PEOPLE, code, distinct, item_name

FAMILY = "orders"
SHOPS = (
    "bakery", "florist", "bookshop", "toyshop", "pharmacy", "grocery", "butcher", "jeweller", "hatter", "cobbler",
    "garden_shop", "bike_shop", "music_shop", "pet_shop", "tea_house", "wine_cellar", "art_shop", "sports_shop",
    "antiques",
    "camera_shop", "fish_market", "furniture_store", "hardware_store", "optician", "perfumery", "stationer", "tailor",
    "tool_shed", "souvenir_shop", "kiosk", "sweet_shop", "cheese_shop", "boat_shop", "lamp_store", "carpet_store",
    "phone_shop", "record_store", "costume_shop", "puppet_shop", "kite_shop",
)  # fmt: skip
NUM_ITEMS, NUM_ORDERS = 5, 4


def groups() -> list[list[Tool]]:
    return [[*_item_tools(shop), *_order_tools(shop)] for shop in SHOPS]


def _items(state: State, shop: str) -> dict[str, dict[str, Any]]:
    def make(rng: Random) -> dict[str, Any]:
        return {
            name: {"price": round(rng.randint(4, 400) / 2, 1), "stock": rng.randint(0, 90)}
            for name in distinct(rng, item_name, NUM_ITEMS)
        }

    return state.table(f"{shop}/items", make)


def _orders(state: State, shop: str) -> dict[str, dict[str, Any]]:
    def make(rng: Random) -> dict[str, Any]:
        customers = iter(rng.sample(PEOPLE, NUM_ORDERS))
        return {
            order_id: {
                "customer": next(customers),
                "item": item_name(rng),
                "quantity": rng.randint(1, 9),
                "status": "open",
            }
            for order_id in distinct(rng, code, NUM_ORDERS)
        }

    return state.table(f"{shop}/orders", make)


def _item(state: State, shop: str, name: str) -> dict[str, Any]:
    items = _items(state, shop)
    if name not in items:
        raise ToolError(f"the {shop.replace('_', ' ')} has no item '{name}'")
    return items[name]


def _order(state: State, shop: str, order_id: str) -> dict[str, Any]:
    orders = _orders(state, shop)
    if order_id not in orders:
        raise ToolError(f"the {shop.replace('_', ' ')} has no order '{order_id}'")
    return orders[order_id]


def _tool(
    shop: str,
    name: str,
    description: str,
    schema: dict[str, Any],
    run: Callable[[State, dict[str, Any]], Any],
    usage: Usage,
) -> Tool:
    place = f"the {shop.replace('_', ' ')}"
    return Tool(name.format(shop=shop), description, schema, FAMILY, shop, place, run, usage)


def _item_tools(shop: str) -> list[Tool]:
    place = shop.replace("_", " ")
    return [_items_lister(shop, place), _price_reader(shop, place), _stock_reader(shop, place), _pricer(shop, place)]


def _one_item(shop: str) -> Callable[[Random, State], dict[str, Any]]:
    return lambda rng, state: {"item": rng.choice(list(_items(state, shop)))}


def _items_lister(shop: str, place: str) -> Tool:
    usage = Usage(
        lambda rng, state: {},
        (f"list the items of the {place}", f"tell me what the {place} sells", f"show everything on sale at the {place}",
         f"name all goods of the {place}"),
        f"the items of the {place}", f"The {place} sells {{result}}.",
    )  # fmt: skip
    return _tool(
        shop, "list_{shop}_items", f"List the items of the {place}.", parameters(),
        lambda state, args: list(_items(state, shop)), usage,
    )  # fmt: skip


def _price_reader(shop: str, place: str) -> Tool:
    usage = Usage(
        _one_item(shop),
        (f"find the price of the {{item}} at the {place}", f"tell me what the {{item}} costs at the {place}",
         f"check how much the {place} charges for the {{item}}", f"ask the {place} for its price of the {{item}}"),
        f"the price of the {{item}} at the {place}", "The {item} costs {result}.",
        gives="number", lookup=Lookup("item", f"list_{shop}_items"),
    )  # fmt: skip
    return _tool(
        shop, "get_{shop}_price", f"Price of an item at the {place}.", parameters(item="string"),
        lambda state, args: _item(state, shop, args["item"])["price"], usage,
    )  # fmt: skip


def _stock_reader(shop: str, place: str) -> Tool:
    usage = Usage(
        _one_item(shop),
        (f"find how many pieces of the {{item}} the {place} has", f"tell me the stock of the {{item}} at the {place}",
         f"check how many of the {{item}} are left at the {place}", f"count the {{item}} stocked by the {place}"),
        f"the stock of the {{item}} at the {place}", f"The {place} has {{result}} of the {{item}}.",
        gives="number", lookup=Lookup("item", f"list_{shop}_items"),
    )  # fmt: skip
    return _tool(
        shop, "get_{shop}_stock", f"Pieces of an item in stock at the {place}.", parameters(item="string"),
        lambda state, args: _item(state, shop, args["item"])["stock"], usage,
    )  # fmt: skip


def _pricer(shop: str, place: str) -> Tool:
    def run(state: State, args: dict[str, Any]) -> float:
        return tidy(sum(_item(state, shop, item)["price"] * count for item, count in args["basket"].items()))

    usage = Usage(
        lambda rng, state: {"basket": {item: rng.randint(1, 6) for item in rng.sample(list(_items(state, shop)), 2)}},
        (f"find the total price of {{basket}} at the {place}", f"tell me what {{basket}} cost together at the {place}",
         f"check how much the {place} charges for {{basket}}", f"price a {place} basket of {{basket}}"),
        f"the total price of {{basket}} at the {place}", "Together they cost {result}.", gives="number",
    )  # fmt: skip
    description = f"Total price of items and counts at the {place}."
    return _tool(shop, "price_{shop}_basket", description, parameters(basket="object"), run, usage)


def _order_tools(shop: str) -> list[Tool]:
    place = shop.replace("_", " ")
    return [
        _finder(shop, place),
        _reader(shop, place),
        _placer(shop, place),
        _canceller(shop, place),
        _lister(shop, place),
    ]


def _one_order(shop: str) -> Callable[[Random, State], dict[str, Any]]:
    return lambda rng, state: {"order_id": rng.choice(list(_orders(state, shop)))}


def _finder(shop: str, place: str) -> Tool:
    def run(state: State, args: dict[str, Any]) -> str:
        for order_id, order in _orders(state, shop).items():
            if order["customer"] == args["customer"]:
                return order_id
        raise ToolError(f"the {place} has no order of '{args['customer']}'")

    usage = Usage(
        lambda rng, state: {"customer": rng.choice([order["customer"] for order in _orders(state, shop).values()])},
        (f"find the order of {{customer}} at the {place}", f"tell me the number of {{customer}}'s {place} order",
         f"search the {place} for what {{customer}} ordered",
         f"get the id of the order {{customer}} has at the {place}"),
        f"the {place} order of {{customer}}", "The order of {customer} is {result}.", gives=f"{shop}/order",
    )  # fmt: skip
    description = f"Find a customer's order id at the {place}."
    return _tool(shop, "find_{shop}_order", description, parameters(customer="string"), run, usage)


def _reader(shop: str, place: str) -> Tool:
    usage = Usage(
        _one_order(shop),
        (f"show order {{order_id}} of the {place}", f"tell me what is in {place} order {{order_id}}",
         f"open order {{order_id}} at the {place}", f"read out the {place}'s order {{order_id}}"),
        f"the details of {place} order {{order_id}}",
        "Order {order_id}: {result[quantity]} of the {result[item]}, {result[status]}.",
        pipe=Pipe("order_id", f"{shop}/order",
                  ("show that order", "tell me what is in it", "open it", "read it out")),
        lookup=Lookup("order_id", f"list_{shop}_orders"),
    )  # fmt: skip
    return _tool(
        shop, "get_{shop}_order", f"Details of an order at the {place}.", parameters(order_id="string"),
        lambda state, args: dict(_order(state, shop, args["order_id"])), usage,
    )  # fmt: skip


def _placer(shop: str, place: str) -> Tool:
    def run(state: State, args: dict[str, Any]) -> str:
        _item(state, shop, args["item"])
        if not 1 <= args["quantity"] <= 1000:
            raise ToolError("quantity must be from 1 to 1000")
        # The id follows from the content, so the order of independent calls changes nothing.
        number = crc32(repr(sorted(args.items())).encode())
        order_id = f"N{number % 9000 + 1000}"
        _orders(state, shop)[order_id] = {**args, "status": "open"}
        return order_id

    def sample(rng: Random, state: State) -> dict[str, Any]:
        item = rng.choice(list(_items(state, shop)))
        return {"item": item, "quantity": rng.randint(1, 12), "customer": rng.choice(PEOPLE)}

    usage = Usage(
        sample,
        (f"order {{quantity}} of the {{item}} at the {place} for {{customer}}",
         f"buy {{customer}} {{quantity}} of the {{item}} from the {place}",
         f"place an order at the {place}: {{quantity}} of the {{item}} for {{customer}}",
         f"have the {place} send {{quantity}} of the {{item}} to {{customer}}"),
        f"to order {{quantity}} of the {{item}} for {{customer}} at the {place}",
        "I ordered {quantity} of the {item} for {customer}: order {result}.",
        lookup=Lookup("item", f"list_{shop}_items"),
    )  # fmt: skip
    schema = parameters(item="string", quantity="integer", customer="string")
    return _tool(shop, "place_{shop}_order", f"Place an order at the {place}.", schema, run, usage)


def _canceller(shop: str, place: str) -> Tool:
    def run(state: State, args: dict[str, Any]) -> str:
        order = _order(state, shop, args["order_id"])
        if order["status"] == "cancelled":
            raise ToolError(f"order {args['order_id']} is already cancelled")
        order["status"] = "cancelled"
        return f"order {args['order_id']} cancelled"

    usage = Usage(
        _one_order(shop),
        (f"cancel order {{order_id}} at the {place}", f"call off the {place} order {{order_id}}",
         f"withdraw order {{order_id}} from the {place}", f"stop the {place} from shipping {{order_id}}"),
        f"to cancel {place} order {{order_id}}", "Order {order_id} is cancelled.",
        pipe=Pipe("order_id", f"{shop}/order", ("cancel it", "call it off", "withdraw it", "stop it from shipping")),
        lookup=Lookup("order_id", f"list_{shop}_orders"),
    )  # fmt: skip
    return _tool(
        shop, "cancel_{shop}_order", f"Cancel an order at the {place}.", parameters(order_id="string"), run, usage
    )


def _lister(shop: str, place: str) -> Tool:
    usage = Usage(
        lambda rng, state: {},
        (f"list the orders of the {place}", f"tell me which orders the {place} has", f"show every order at the {place}",
         f"name all order ids of the {place}"),
        f"the orders of the {place}", "The orders are {result}.",
    )  # fmt: skip
    return _tool(
        shop, "list_{shop}_orders", f"List the order ids of the {place}.", parameters(),
        lambda state, args: list(_orders(state, shop)), usage,
    )  # fmt: skip
