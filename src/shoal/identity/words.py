"""Two word lists of 256 each: friendly, short, hard to confuse. Their order is protocol."""

from __future__ import annotations

_ADJECTIVES = """
able active agile airy alert alpine amber ample amused ancient apt arctic artful autumn avid
awake azure balmy basic beaming bold bonny brave breezy brief bright brisk broad bronze bubbly
busy calm candid careful caring casual central charming cheery chief civic civil classic clean
clear clever cloudy coastal cobalt comfy cool copper coral cordial cosmic cosy crafty creamy
crimson crisp cuddly curious curly cute dainty dapper daring dashing dawning dear decent deep
deft devoted dewy digital direct distant dreamy driven dusky eager early earnest earthy easy
eastern elastic electric elegant emerald eminent epic equal even evident exact expert fabled
fair famous fancy fast fearless festive fine firm fluent fluffy flying fond formal frank free
fresh frosty funny gallant gentle genuine giant gifted giving glad gleaming global glossy golden
good graceful grand grateful green groovy growing handy happy hardy harmonic hazel hearty
helpful heroic hidden honest humble humming icy ideal indigo inland jade jazzy jolly jovial
joyful jubilant juicy keen kind known large lasting lavender leafy level light likely lime linen
lively local lofty logical long loud loving loyal lucid lucky lunar magic magnetic major maple
marble mellow merry mighty mild mindful minty misty mobile modern modest mossy musical native
natural neat nifty nimble noble northern novel olive open orange orderly organic patient
peaceful pearly peppy perky placid playful pleasant plucky polished polite poetic precise prime
proud pure purple quaint quick quiet radiant rapid rare ready regal relaxed robust rosy royal
ruby rustic sandy scarlet secure serene shining silent silver smiling snowy snug solar solid
spry steady
"""

_NOUNS = """
acorn agate albatross alder almond anchor anemone antelope apricot aspen aster auk badger bamboo
banjo barley basil bay beacon beaver beech bell birch bison blossom bluebell boat bobcat breeze
bridge brook buffalo butterfly cabin cactus camel candle canoe canyon cardinal caribou carp
cedar cello cheetah cherry chestnut cicada citrus clam cliff clover cod comet compass condor
cove coyote crab crane cricket crocus crystal cypress daffodil dahlia daisy dolphin donkey dove
dragonfly drum duck dune eagle echo eel egret elk elm ember emu falcon fawn fennel fern ferret
fiddle fig finch firefly fjord flamingo flute forest fossil fountain fox frog galaxy gannet
garden gazelle gecko geyser gibbon ginger giraffe glacier goose gorge granite grape grebe grove
gull guppy hamlet hamster harbor harp hawk hawthorn heather hedgehog heron herring hickory hill
hippo holly honey hornbeam husky hyacinth ibex ibis iguana iris island ivy jackal jaguar jasmine
jay juniper kayak kelp kestrel kingfisher kite kiwi koala lagoon lantern larch lark lemur
leopard lichen lighthouse lilac lily linnet lion lizard llama lobster loon lotus lynx macaw
magnet magnolia magpie mallard manatee mango mantis marigold marlin marmot marsh martin meadow
melon meteor minnow mole moose moss mussel myrtle narwhal nebula nectar nettle newt nutmeg oak
oasis ocelot octopus orchid oriole osprey otter owl oyster panda panther papaya parrot peach
pebble pelican penguin peony perch petrel pigeon pike pine planet plover plum pony poplar poppy
prairie puffin puma quail quartz quince rabbit raccoon raven reef reindeer river robin rowan
saffron salmon sparrow spruce squid starling stork sunflower swan thistle tiger trout walrus
"""

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
