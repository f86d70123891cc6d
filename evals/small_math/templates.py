"""The sentences. A template is a question and the steps of its solution.

    {a:3-60}   a number of that range, later {a}; all of a problem's given numbers come from such slots
    {name}     a word of WORDS["name"]; a digit tells further ones apart ({name2}), and no word comes twice in a problem
    [a+b=t]    a step: the value of a+b is from then on {t}. Two operands, each a variable or a whole number.
               Written 12 + 7 = <<12+7=19>>19, as gsm8k does

The last step's value is the answer. Every value is a whole number from 1 to LIMIT.
"""

LIMIT = 999

WORDS: dict[str, tuple[str, ...]] = {
    "name": (
        "Anna", "Ben", "Carla", "David", "Elena", "Farid", "Grace", "Henry", "Ines", "Jonas", "Kira", "Leo", "Maya",
        "Nils", "Olga", "Paulo", "Quentin", "Rosa", "Samir", "Tessa", "Umar", "Vera", "Walter", "Yuki", "Zoe", "Amal",
    ),
    "item": (
        "pencils", "stickers", "marbles", "buttons", "stamps", "coins", "shells", "beads", "balloons", "candles",
        "erasers", "postcards", "crayons", "badges", "ribbons", "magnets", "notebooks", "toys",
    ),
    "food": (
        "apples", "cookies", "oranges", "muffins", "sandwiches", "pears", "cupcakes", "lemons", "bagels", "carrots",
        "peaches", "pretzels",
    ),
    "pastry": ("cookies", "muffins", "cupcakes", "bagels", "pretzels", "rolls", "scones", "waffles"),
    "animal": ("chickens", "goats", "sheep", "rabbits", "ducks", "cows", "horses", "pigs"),
    "plant": ("roses", "tulips", "daisies", "lilies", "sunflowers", "ferns"),
    "place": ("museum", "zoo", "aquarium", "theater", "circus", "castle"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
}  # fmt: skip

# Lines of one template each: question | step | step ...
_TRAIN = """
{name} has {a:3-60} {item}. {name2} gives {name} {b:2-40} more {item}. How many {item} does {name} have now? | {name} now has [a+b=t] {item}.
There are {a:10-90} {item} in a box. {name} takes out {b:2-60} of them. How many {item} are left in the box? | There are [a-b=t] {item} left in the box.
{name} buys {a:2-12} packs of {item}. Each pack holds {b:2-15} {item}. How many {item} does {name} buy? | {name} buys [a*b=t] {item}.
{name} shares {a:6-96} {food} equally among {b:2-9} friends. How many {food} does each friend get? | Each friend gets [a/b=t] {food}.
{name} is {a:5-40} years old. {name2} is {b:2-30} years older than {name}. How old is {name2}? | {name2} is [a+b=t] years old.
{name} read {a:5-60} pages on {day} and {b:5-60} pages on {day2}. How many pages did {name} read on the two days? | {name} read [a+b=t] pages.
{name} has a rope of {a:12-95} meters. {name} cuts off {b:3-60} meters. How many meters of rope are left? | There are [a-b=t] meters left.
A ticket to the {place} costs {a:3-15} dollars. How many dollars do {b:2-12} tickets cost? | The tickets cost [a*b=t] dollars.
{name} walks {a:2-12} miles every day. How many miles does {name} walk in {b:3-14} days? | {name} walks [a*b=t] miles.
{name} needs {a:20-99} {item} for a project and has {b:5-80}. How many more {item} does {name} need? | {name} needs [a-b=t] more {item}.
{name} sets up {a:2-12} rows of chairs with {b:3-15} chairs in each row. How many chairs does {name} set up? | {name} sets up [a*b=t] chairs.
{name} puts {a:8-96} {item} into bags of {b:2-12}. How many bags does {name} fill? | {name} fills [a/b=t] bags.
A bus carries {a:10-50} people. At the next stop {b:2-30} people get on. How many people are on the bus now? | There are [a+b=t] people on the bus.
{name} found {a:4-60} {item}, which is {b:2-30} fewer than {name2} found. How many {item} did {name2} find? | {name2} found [a+b=t] {item}.
A farmer has {a:5-70} {animal} and {b:5-70} {animal2}. How many animals does the farmer have? | The farmer has [a+b=t] animals.
{name} drives {a:4-96} miles and uses one gallon of fuel for every {b:2-12} miles. How many gallons does {name} use? | {name} uses [a/b=t] gallons.
{name} has {a:5-60} {item} and finds {b:2-30} more. Then {name} gives {c:2-40} {item} to {name2}. How many {item} does {name} have left? | {name} first has [a+b=t] {item}. | After giving some away {name} has [t-c=u] {item}.
{name} buys {a:2-12} {food} for {b:2-9} dollars each and pays with {c:20-99} dollars. How many dollars does {name} get back? | The {food} cost [a*b=t] dollars. | {name} gets back [c-t=u] dollars.
{name} has {a:3-30} {item}. {name2} has twice as many. How many {item} do they have together? | {name2} has [2*a=t] {item}. | Together they have [a+t=u] {item}.
{name} has {a:4-60} {food}. {name2} has half as many. How many {food} do they have together? | {name2} has [a/2=t] {food}. | Together they have [a+t=u] {food}.
A baker makes {a:2-12} trays of {b:3-12} {pastry} and sells {c:5-90} of them. How many {pastry} are left? | The baker makes [a*b=t] {pastry}. | There are [t-c=u] {pastry} left.
{name} plants {a:2-9} rows of {b:3-12} {plant} and {c:3-50} {plant2}. How many flowers does {name} plant? | There are [a*b=t] {plant}. | In all {name} plants [t+c=u] flowers.
{name} earns {a:5-20} dollars an hour. {name} works {b:2-9} hours on {day} and {c:2-9} hours on {day2}. How many dollars does {name} earn? | {name} works [b+c=t] hours. | {name} earns [a*t=u] dollars.
{name} had {a:20-99} {item} and lost {b:2-40} of them. The rest fit into {c:2-9} equal boxes. How many {item} are in each box? | {name} still had [a-b=t] {item}. | Each box holds [t/c=u] {item}.
{name} and {name2} pick {a:6-60} and {b:6-60} {food} and share them equally. How many {food} does each of them get? | They pick [a+b=t] {food}. | Each of them gets [t/2=u] {food}.
A school buys {a:2-9} boxes of {b:4-24} {item} for {c:2-12} classes. How many {item} does each class get? | The school buys [a*b=t] {item}. | Each class gets [t/c=u] {item}.
{name} saves {a:2-20} dollars a week for {b:3-12} weeks and then spends {c:5-90} dollars. How many dollars does {name} have left? | {name} saves [a*b=t] dollars. | {name} has [t-c=u] dollars left.
{name} has {a:10-60} {item}. {name2} has {b:2-30} more than {name}. How many {item} do they have together? | {name2} has [a+b=t] {item}. | Together they have [a+t=u] {item}.
{name} has {a:12-80} {item}. {name2} has {b:2-40} fewer than {name}. How many {item} do they have together? | {name2} has [a-b=t] {item}. | Together they have [a+t=u] {item}.
A train has {a:3-12} cars with {b:4-20} seats each. {c:5-90} seats are taken. How many seats are free? | The train has [a*b=t] seats. | There are [t-c=u] free seats.
{name} runs {a:2-9} laps of {b:2-12} minutes each and rests for {c:3-30} minutes. How many minutes does that take? | The laps take [a*b=t] minutes. | In all it takes [t+c=u] minutes.
{name} bakes {a:10-60} {pastry} on {day} and {b:10-60} on {day2} and puts them into boxes of {c:2-12}. How many boxes are there? | {name} bakes [a+b=t] {pastry}. | There are [t/c=u] boxes.
A pool holds {a:3-20} cubic meters of water and {b:2-9} pools are filled. Each truck brings {c:2-12} cubic meters. How many trucks are needed? | The pools hold [a*b=t] cubic meters. | That takes [t/c=u] trucks.
{name} buys {item} for {a:3-40} dollars, {food} for {b:3-40} dollars and a book for {c:3-40} dollars. How many dollars does {name} spend? | The first two cost [a+b=t] dollars. | In all {name} spends [t+c=u] dollars.
{name} has {a:2-12} bags of {b:2-12} {food}. {name} eats {c:1-9} and gives {d:2-30} to {name2}. How many {food} are left? | {name} has [a*b=t] {food}. | After eating some there are [t-c=u] {food}. | After giving some away there are [u-d=v] {food}.
{name} has {a:3-20} {item}. {name2} has {b:2-6} times as many. {name3} has {c:2-30} more than {name2}. How many {item} does {name3} have? | {name2} has [a*b=t] {item}. | {name3} has [t+c=u] {item}.
{name} has {a:3-20} {item}. {name2} has {b:2-6} times as many, and {name3} has {c:2-30}. How many {item} do the three have? | {name2} has [a*b=t] {item}. | {name} and {name2} have [a+t=u] {item}. | The three have [u+c=v] {item}.
{name} works {a:2-8} hours a day for {b:2-6} days at {c:5-15} dollars an hour. How many dollars does {name} earn? | {name} works [a*b=t] hours. | {name} earns [t*c=u] dollars.
{name} works {a:2-8} hours a day for {b:2-6} days at {c:5-15} dollars an hour and then spends {d:10-90} dollars. How many dollars are left? | {name} works [a*b=t] hours. | {name} earns [t*c=u] dollars. | There are [u-d=v] dollars left.
A shop sells {a:5-40} {food} on {day}, twice as many on {day2} and {b:5-40} on {day3}. How many {food} does it sell? | On {day2} it sells [2*a=t] {food}. | On the first two days it sells [a+t=u] {food}. | In all it sells [u+b=v] {food}.
A farm has {a:4-30} {animal}, {b:2-5} times as many {animal2} and {c:3-30} {animal3}. How many animals does it have? | There are [a*b=t] {animal2}. | Without the {animal3} there are [a+t=u] animals. | In all there are [u+c=v] animals.
{name} has {a:20-99} dollars and buys {b:2-8} {item} for {c:2-6} dollars each. The rest is shared by {d:2-5} children. How many dollars does each child get? | The {item} cost [b*c=t] dollars. | {name} has [a-t=u] dollars left. | Each child gets [u/d=v] dollars.
{name} reads {a:5-30} pages a day for {b:2-7} days. The book has {c:60-300} pages. How many pages a day must {name} read to finish it in {d:2-9} more days? | {name} reads [a*b=t] pages. | There are [c-t=u] pages left. | {name} must read [u/d=v] pages a day.
{name} buys {a:2-9} tickets for {b:3-15} dollars and {c:2-9} drinks for {d:2-6} dollars. How many dollars does {name} pay? | The tickets cost [a*b=t] dollars. | The drinks cost [c*d=u] dollars. | {name} pays [t+u=v] dollars.
There are {a:2-9} boxes with {b:3-12} {item} and {c:2-9} boxes with {d:3-12} {item}. How many {item} are there? | The first boxes hold [a*b=t] {item}. | The other boxes hold [c*d=u] {item}. | There are [t+u=v] {item}.
{name} picks {a:10-60} {food}, {name2} picks {b:10-60}, and they put all of them into {c:2-9} baskets. {name3} takes one basket. How many {food} does {name3} take? | They pick [a+b=t] {food}. | Each basket holds [t/c=u] {food}.
{name} has {a:10-60} {item}, gets {b:2-30} from {name2} and {c:2-30} from {name3}, and loses {d:2-20}. How many {item} does {name} have now? | With those of {name2} there are [a+b=t] {item}. | With those of {name3} there are [t+c=u] {item}. | Now {name} has [u-d=v] {item}.
A bus starts with {a:10-40} people. {b:2-9} get off and {c:2-20} get on at the first stop, and {d:2-9} get off at the second. How many people are on the bus? | After some get off there are [a-b=t] people. | After some get on there are [t+c=u] people. | After the second stop there are [u-d=v] people.
{name} makes {a:2-9} bracelets with {b:5-20} beads each and has {c:2-30} beads left over. A box holds {d:2-9} beads. How many boxes did {name} open? | The bracelets take [a*b=t] beads. | {name} had [t+c=u] beads. | {name} opened [u/d=v] boxes.
{name} has {a:2-9} weeks until a trip that costs {b:50-300} dollars and has {c:10-90} dollars. How many dollars a week must {name} save? | {name} still needs [b-c=t] dollars. | That is [t/a=u] dollars a week.
A class of {a:10-35} children and {b:2-6} teachers visits the {place}. A ticket costs {c:2-9} dollars. How many dollars do the tickets cost? | There are [a+b=t] people. | The tickets cost [t*c=u] dollars.
A class of {a:10-35} children visits the {place}. A ticket costs {b:3-9} dollars, and the bus costs {c:20-90} dollars. How many dollars does the trip cost? | The tickets cost [a*b=t] dollars. | The trip costs [t+c=u] dollars.
{name} is {a:4-20} years old. {name2} is {b:2-4} times as old. How old will {name2} be in {c:2-15} years? | {name2} is [a*b=t] years old. | In {c} years {name2} will be [t+c=u] years old.
{name} is {a:10-40} years old. {name2} is {b:2-9} years younger, and {name3} is half as old as {name2}. How old is {name3}? | {name2} is [a-b=t] years old. | {name3} is [t/2=u] years old.
{name} sells {a:5-30} {pastry} for {b:2-6} dollars each. Making them cost {c:5-60} dollars. The profit goes to {d:2-5} people. How many dollars does each get? | {name} takes in [a*b=t] dollars. | The profit is [t-c=u] dollars. | Each gets [u/d=v] dollars.
{name} has {a:3-12} shelves with {b:4-15} books each and gives away {c:5-50} books. Then {name} buys {d:2-20} books. How many books does {name} have? | {name} has [a*b=t] books at first. | After giving some away there are [t-c=u] books. | Now {name} has [u+d=v] books.
{name} fills {a:2-8} bags with {b:3-12} {food}. {name2} fills {c:2-8} bags with {d:3-12} {food}. They sell {e:2-30} of them. How many {food} are left? | {name} has [a*b=t] {food}. | {name2} has [c*d=u] {food}. | Together they have [t+u=v] {food}. | There are [v-e=w] {food} left.
{name} buys {a:2-8} {item} for {b:2-9} dollars and {c:2-8} {food} for {d:2-9} dollars and pays with {e:50-99} dollars. How many dollars does {name} get back? | The {item} cost [a*b=t] dollars. | The {food} cost [c*d=u] dollars. | Together that is [t+u=v] dollars. | {name} gets back [e-v=w] dollars.
{name} has {a:3-15} {item}. {name2} has twice as many and {name3} has {b:2-20} more than {name2}. How many {item} do the three have? | {name2} has [2*a=t] {item}. | {name3} has [t+b=u] {item}. | {name} and {name2} have [a+t=v] {item}. | The three have [u+v=w] {item}.
A shop gets {a:2-9} crates of {b:5-20} {food}. {c:2-20} are bad, and the shop sells {d:5-60}. The rest goes into {e:2-6} bags. How many {food} are in each bag? | The shop gets [a*b=t] {food}. | There are [t-c=u] good ones. | After the sale there are [u-d=v] {food}. | Each bag holds [v/e=w] {food}.
{name} jogs {a:2-9} miles on each of {b:2-5} days and bikes {c:3-15} miles on each of {d:2-4} days. The goal is {e:60-150} miles. How many miles are missing? | {name} jogs [a*b=t] miles. | {name} bikes [c*d=u] miles. | Together that is [t+u=v] miles. | There are [e-v=w] miles missing.
{name} earns {a:5-15} dollars an hour for {b:3-9} hours and gets {c:5-30} dollars from {name2}. {name} buys {d:2-6} gifts of equal price with all of it. How many dollars is one gift? | {name} earns [a*b=t] dollars. | {name} has [t+c=u] dollars. | One gift is [u/d=v] dollars.
A garden has {a:2-8} rows of {b:3-12} {plant} and {c:2-8} rows of {d:3-12} {plant2}. {name} cuts {e:2-20} flowers. How many flowers are left? | There are [a*b=t] {plant}. | There are [c*d=u] {plant2}. | There are [t+u=v] flowers. | After the cut [v-e=w] flowers are left.
{name} watches {a:2-6} films of {b:20-90} minutes and {c:2-9} shows of {d:10-40} minutes. How many minutes longer do the films take than the shows? | The films take [a*b=t] minutes. | The shows take [c*d=u] minutes. | The films take [t-u=v] minutes longer.
{name} has {a:12-90} {item} and keeps {b:2-10}. The others are shared by {c:2-6} friends. {name2} is one of them and already had {d:2-30}. How many {item} does {name2} have now? | {name} gives away [a-b=t] {item}. | Each friend gets [t/c=u] {item}. | {name2} now has [u+d=v] {item}.
A truck carries {a:3-12} crates of {b:5-20} {food}. At each of {c:2-6} stops {d:3-15} {food} are unloaded. How many {food} are left on the truck? | The truck carries [a*b=t] {food}. | In all [c*d=u] {food} are unloaded. | There are [t-u=v] {food} left.
"""  # noqa: E501

_HELD_OUT = """
{name} scored {a:5-60} points in the first game and {b:5-60} in the second. What is the total score of {name}? | The total is [a+b=t] points.
A jar held {a:20-95} {item} before {b:3-60} were taken. How many stayed in the jar? | In the jar stayed [a-b=t] {item}.
{name} draws {b:2-15} monsters with {a:3-12} legs each. How many legs does {name} draw? | {name} draws [b*a=t] legs.
{name} cuts a ribbon of {a:8-96} inches into pieces of {b:2-12} inches. How many pieces does {name} make? | {name} makes [a/b=t] pieces.
Each of {a:2-12} teams has {b:3-12} players, and {c:2-20} players are ill. How many players can play? | The teams have [a*b=t] players. | Of these [t-c=u] can play.
{name} had {a:10-80} dollars, got {b:5-40} dollars for a birthday and spent {c:5-60} dollars. How much money is left? | With the gift it was [a+b=t] dollars. | Now [t-c=u] dollars are left.
The {place} has {a:3-30} visitors in the morning and {b:2-5} times as many in the afternoon. How many visitors come that day? | In the afternoon [a*b=t] visitors come. | That day [a+t=u] visitors come.
{name} uses {a:2-6} eggs for a cake and has {b:20-90} eggs, of which {c:2-15} are broken. How many cakes can {name} make? | {name} has [b-c=t] good eggs. | They are enough for [t/a=u] cakes.
{name} paints one room in {a:2-9} hours. There are {b:2-6} rooms on each of {c:2-4} floors. How many hours does {name} need? | There are [b*c=t] rooms. | {name} needs [a*t=u] hours.
{name} swims {a:5-30} laps, {name2} swims {b:2-15} laps more than {name}, and {name3} swims {c:2-4} times as many as {name2}. How many laps does {name3} swim? | {name2} swims [a+b=t] laps. | {name3} swims [t*c=u] laps.
A hotel has {a:3-9} floors with {b:5-20} rooms. Guests stay in {c:10-60} rooms, and {d:2-9} rooms are closed. How many rooms can be booked? | The hotel has [a*b=t] rooms. | Without guests are [t-c=u] rooms. | Of these [u-d=v] can be booked.
{name} collects {a:5-40} {item} in spring, twice as many in summer, and trades {b:5-60} of all of them for a game. How many {item} remain? | In summer it is [2*a=t] {item}. | In both it is [a+t=u] {item}. | There remain [u-b=v] {item}.
A choir of {a:10-30} women and {b:10-30} men sells {c:2-6} tickets a person at {d:2-5} dollars. How many dollars come in? | The choir has [a+b=t] people. | They sell [t*c=u] tickets. | In come [u*d=v] dollars.
{name} orders {a:2-8} pizzas with {b:4-12} slices and {c:2-8} pies with {d:4-10} slices for {e:2-9} guests. How many slices are there for each guest? | The pizzas have [a*b=t] slices. | The pies have [c*d=u] slices. | Together there are [t+u=v] slices. | For each guest there are [v/e=w] slices.
A library owns {a:3-9} shelves of {b:10-30} books, lends {c:10-60}, gets back {d:5-40} and throws away {e:2-9}. How many books does it have in the house? | It owns [a*b=t] books. | After lending there are [t-c=u] books. | With those that came back there are [u+d=v] books. | In the house are [v-e=w] books.
"""  # noqa: E501


def _split(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(part.strip() for part in line.split("|")) for line in text.strip().splitlines())


# (question, step, ...) each; test sets of new templates come from HELD_OUT, everything else from TRAIN.
TRAIN = _split(_TRAIN)
HELD_OUT = _split(_HELD_OUT)
