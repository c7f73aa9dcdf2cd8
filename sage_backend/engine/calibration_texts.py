# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 - letters of other scripts
"""Short texts that an engine reads to calibrate its keys: prose, source code, other languages, a conversation."""

_PROSE = """\
The harbor had been silted up for thirty years when the company decided to dredge it again. Nobody in the town remembered how
deep it had once been, and the only chart in the archive was drawn by a captain who measured in fathoms and wrote in a hand that
three librarians read in three different ways. So the engineers began with a boat, a weighted line and a notebook. They found a
channel of eleven meters along the northern wall, a bank of gravel where the old customs house had stood, and, to everyone's
surprise, the frame of a wooden crane lying on its side in the mud. In March the first ship came. It carried timber, two
printing presses and a doctor who had been told that the town had none. Prices fell by a fifth within a year: salt from 4.10 to
3.25 a sack, lamp oil from 1.80 to 1.45. The mayor, who had opposed the loan, gave a speech about patience. The company's
accounts for that year list income of 182,400 and costs of 175,960, most of it coal for the dredger, and a note in the margin
says: "The crane has been raised. It is oak and perfectly sound. What shall we do with it?" It still stands at the entrance,
painted every other spring, and children are told that it belonged to a giant who fished for whales with a rope and a bell.
"""

_CODE = '''\
import heapq
from collections import defaultdict
from dataclasses import dataclass, field


@dataclass
class Graph:
    """A directed graph with edge weights of at least 0."""

    edges: dict[str, list[tuple[str, float]]] = field(default_factory=lambda: defaultdict(list))

    def connect(self, source: str, target: str, weight: float = 1.0) -> None:
        if weight < 0:
            raise ValueError(f"the weight of {source} -> {target} is {weight}; it must be at least 0")
        self.edges[source].append((target, weight))

    def distances(self, start: str) -> dict[str, float]:
        """Dijkstra's algorithm. Nodes that cannot be reached are not in the result."""
        found: dict[str, float] = {}
        queue = [(0.0, start)]
        while queue:
            distance, node = heapq.heappop(queue)
            if node in found:
                continue
            found[node] = distance
            for target, weight in self.edges.get(node, []):
                if target not in found:
                    heapq.heappush(queue, (distance + weight, target))
        return found


if __name__ == "__main__":
    graph = Graph()
    for line in ["a b 4", "a c 1", "c b 2", "b d 5", "c d 8"]:
        source, target, weight = line.split()
        graph.connect(source, target, float(weight))
    for node, distance in sorted(graph.distances("a").items(), key=lambda item: item[1]):
        print(f"{node:>4} {distance:6.2f}")

SELECT c.name, COUNT(*) AS orders, SUM(o.total) AS paid FROM customers AS c JOIN orders AS o ON o.customer_id = c.id
WHERE o.placed_at >= '2024-01-01' AND o.status <> 'cancelled' GROUP BY c.name HAVING SUM(o.total) > 1000 ORDER BY paid DESC;

{"id": 4711, "tags": ["red", "large"], "size": {"w": 12.5, "h": 80}, "stock": null, "url": "https://example.org/items/4711"}
'''

_SCRIPTS = """\
Вода в реке поднялась за ночь на два метра, и утром мост был закрыт. Школьники обрадовались, а почтальон взял лодку.
在山谷的尽头有一座小图书馆，每个星期天都会开门。馆长是一位退休的数学老师，她把所有的书按照颜色排列，而不是按照书名。
يفتح السوق أبوابه عند الفجر، ويبيع الفلاحون التين والزيتون والعسل حتى تشتد حرارة الشمس.
Die Brücke wurde 1912 gebaut und seitdem dreimal erneuert; ihre Bögen tragen heute Züge, Radwege und eine Wasserleitung.
L'hiver dernier, la neige a fermé le col pendant onze jours, mais le boulanger a livré son pain à skis.
駅の前の時計は五分遅れているが、町の人は誰も直そうとしない。電車もいつも五分遅れて来るからだ。
गाँव के बच्चे हर शाम नदी के किनारे पतंग उड़ाते हैं और हवा का इंतज़ार करते हैं।
El faro se apaga a las siete, cuando el sol ya alumbra la costa y los pescadores vuelven con las redes llenas.
Η γέφυρα ένωνε δύο χωριά που για αιώνες μιλούσαν με διαφορετική προφορά. 마을 사람들은 봄마다 다리 위에서 잔치를 연다.
"""

CHAT = (
    "Hi! I have 3 kg of tomatoes and about two hours. What can I make that keeps for the winter?",
    "A plain tomato sauce keeps best. Here is a plan:\n\n1. Boil six jars and their lids for ten minutes.\n2. Score the "
    "tomatoes, dip them in boiling water for 30 seconds, and peel them.\n3. Simmer them with two tablespoons of olive oil, a "
    "little salt and four cloves of garlic for 45 minutes.\n4. Fill the jars to 1 cm below the rim, close them, and boil them "
    "for another 40 minutes.\n\nAdd a tablespoon of lemon juice to each jar: tomatoes alone are not always sour enough to be "
    "safe.",
    "Great. How much sauce will that be, and can I leave out the garlic?",
    "Roughly 1.8 liters, which fills five or six jars of 330 ml. You can leave the garlic out; nothing else changes. **Tip:** "
    "write the date on the lid. The sauce keeps for about 12 months in a dark, cool place, and for 4 days in the fridge once a "
    "jar is open.",
    "And if a lid does not close properly?",
    "Then do not store that jar. Put it in the fridge and use it first.",
)
"""A conversation: what the user says and what the assistant answers, in turns."""

TEXTS = (_PROSE, _CODE, _SCRIPTS)
