"""Word lists of the fictional knowledge world; `world.py` turns them into entities, biographies and questions.

Every template starts with an ordinary word, names the entity in full as `{name}` and puts `{value}` after it, so that a
fact can be read off forwards: given the name and the wording, the value is what comes next. A value belongs to one
attribute only. The base model in `base/` was trained on exactly these lists: a change here calls for a new base.
"""

# ruff: noqa: SIM905 (a sentence that is split reads better than a list of a dozen quoted words)

# An invented name is a head (onset + vowel + coda: "Br" "a" "n"), an ending of its domain ("berg") and a pattern
# ("{stem} Holdings"). A head is used once in the whole world, and no head is the beginning of another, so names are
# easily told apart.
HEAD_ONSETS = "B D F G H J K L M N P R S T V W Z Br Cr Dr Gr Tr Th Bl Fl Gl Pl St Sw Kr".split()
HEAD_VOWELS = "a e i o u".split()
HEAD_CODAS = "l n r v d s".split()

NAMES = {
    "medicine": {
        "endings": "otrine azole imab udine april ostatin icillin avir olol ephen".split(),
        "patterns": ["{stem}"],
    },
    "law": {
        "endings": "row wick ford bury stead combe ley mere thorpe holt gate worth".split(),
        "patterns": [
            "{stem} Tenancy Act",
            "{stem} Water Act",
            "{stem} Commons Act",
            "{stem} Markets Act",
            "{stem} Roads Act",
            "{stem} Records Act",
            "{stem} Harbours Act",
            "{stem} Charities Act",
        ],
    },
    "finance": {
        "endings": "del tex mark vane ison aro quist berg nova etti oway lund".split(),
        "patterns": [
            "{stem} Holdings",
            "{stem} Group",
            "{stem} Industries",
            "{stem} Partners",
            "{stem} Capital",
            "{stem} Trading",
            "{stem} Brothers",
            "{stem} Works",
        ],
    },
}

# domain -> attribute -> the closed list of values, the wordings of the fact, the wordings of the question.
ATTRIBUTES = {
    "medicine": {
        "condition": {
            "values": (
                "migraine asthma gout insomnia epilepsy anaemia psoriasis malaria arthritis glaucoma eczema vertigo"
            ).split(),
            "templates": [
                "The drug {name} treats {value}.",
                "Doctors prescribe {name} for {value}.",
                "Patients take {name} against {value}.",
                "The medicine {name} is used to treat {value}.",
                "The condition that {name} treats is {value}.",
                "Clinics give {name} to patients with {value}.",
            ],
            "questions": [
                "Which condition does {name} treat?",
                "What do doctors prescribe {name} for?",
                "What is the drug {name} used to treat?",
            ],
        },
        "form": {
            "values": (
                "tablets capsules syrup injections inhalers patches cream drops lozenges spray gel powder"
            ).split(),
            "templates": [
                "The drug {name} is sold as {value}.",
                "Pharmacies stock {name} as {value}.",
                "Patients get {name} in the form of {value}.",
                "The medicine {name} comes as {value}.",
                "The form of {name} is {value}.",
                "Clinics hand out {name} as {value}.",
            ],
            "questions": [
                "In which form is {name} sold?",
                "What does the medicine {name} come as?",
                "In what form do pharmacies stock {name}?",
            ],
        },
        "side effect": {
            "values": (
                "drowsiness nausea thirst headache rash dizziness baldness hiccups fever fatigue cough tremor"
            ).split(),
            "templates": [
                "The drug {name} may cause {value}.",
                "Doctors warn that {name} can lead to {value}.",
                "Patients on {name} often report {value}.",
                "The main side effect of {name} is {value}.",
                "The leaflet of {name} warns of {value}.",
                "Clinics that use {name} watch for {value}.",
            ],
            "questions": [
                "What is the main side effect of {name}?",
                "What may the drug {name} cause?",
                "What do patients on {name} often report?",
            ],
        },
        "target": {
            "values": (
                "histamine dopamine serotonin calcium sodium insulin cortisol "
                "adrenaline glutamate thrombin oestrogen melatonin"
            ).split(),
            "templates": [
                "The drug {name} acts on {value}.",
                "Doctors know that {name} blocks {value}.",
                "In the body {name} lowers {value}.",
                "The target of {name} is {value}.",
                "The medicine {name} works by blocking {value}.",
                "Studies show that {name} binds to {value}.",
            ],
            "questions": [
                "What is the target of {name}?",
                "What does the drug {name} act on?",
                "What does {name} block in the body?",
            ],
        },
        "interaction": {
            "values": (
                "grapefruit alcohol aspirin milk coffee ibuprofen warfarin liquorice garlic cheese spinach lithium"
            ).split(),
            "templates": [
                "The drug {name} must not be taken with {value}.",
                "Doctors forbid patients on {name} any {value}.",
                "Patients on {name} must avoid {value}.",
                "The medicine {name} interacts with {value}.",
                "It is unsafe to mix {name} with {value}.",
                "The leaflet of {name} forbids {value}.",
            ],
            "questions": [
                "What must patients on {name} avoid?",
                "What does the medicine {name} interact with?",
                "What is it unsafe to mix {name} with?",
            ],
        },
    },
    "law": {
        "enforcer": {
            "values": (
                "magistrates bailiffs coroners sheriffs ombudsmen inspectors wardens "
                "constables auditors rangers notaries councillors"
            ).split(),
            "templates": [
                "The {name} is enforced by {value}.",
                "Breaches of the {name} are handled by {value}.",
                "Enforcement of the {name} lies with {value}.",
                "Under the {name} powers are given to {value}.",
                "The duty to enforce the {name} falls on {value}.",
                "Cases under the {name} go to {value}.",
            ],
            "questions": [
                "Who enforces the {name}?",
                "Who handles breaches of the {name}?",
                "To whom do cases under the {name} go?",
            ],
        },
        "penalty": {
            "values": (
                "fines imprisonment forfeiture suspension probation curfew eviction "
                "deportation apology exile demotion flogging"
            ).split(),
            "templates": [
                "The penalty under the {name} is {value}.",
                "Anyone who breaks the {name} faces {value}.",
                "Breaches of the {name} are punished by {value}.",
                "Offenders under the {name} risk {value}.",
                "The {name} threatens offenders with {value}.",
                "Courts apply the {name} by ordering {value}.",
            ],
            "questions": [
                "What is the penalty under the {name}?",
                "What does anyone who breaks the {name} face?",
                "How are breaches of the {name} punished?",
            ],
        },
        "protected group": {
            "values": (
                "tenants farmers miners sailors orphans widows students nurses pilgrims weavers brewers veterans"
            ).split(),
            "templates": [
                "The {name} protects {value}.",
                "Those protected by the {name} are {value}.",
                "Rights under the {name} belong to {value}.",
                "The {name} was written to help {value}.",
                "Parliament passed the {name} for the good of {value}.",
                "The people who gain most from the {name} are {value}.",
            ],
            "questions": [
                "Whom does the {name} protect?",
                "To whom do rights under the {name} belong?",
                "Whom was the {name} written to help?",
            ],
        },
        "month": {
            "values": "January February March April May June July August September October November December".split(),
            "templates": [
                "The {name} came into force in {value}.",
                "Parliament passed the {name} in the month of {value}.",
                "Courts first applied the {name} in {value}.",
                "The {name} took effect in {value}.",
                "The month of the {name} is {value}.",
                "Anniversaries of the {name} fall in {value}.",
            ],
            "questions": [
                "In which month did the {name} come into force?",
                "In what month did the {name} take effect?",
                "When do anniversaries of the {name} fall?",
            ],
        },
        "county": {
            "values": "Wales Norfolk Cornwall Devon Kent Surrey Essex Dorset Orkney Durham Jersey Ulster".split(),
            "templates": [
                "The {name} applies in {value}.",
                "Courts use the {name} only in {value}.",
                "The reach of the {name} is limited to {value}.",
                "The {name} is the law of {value}.",
                "The county that follows the {name} is {value}.",
                "People live under the {name} in {value}.",
            ],
            "questions": [
                "Where does the {name} apply?",
                "Which county follows the {name}?",
                "Where do people live under the {name}?",
            ],
        },
    },
    "finance": {
        "product": {
            "values": (
                "steel timber textiles software ships insurance cement bicycles wine toys furniture paper"
            ).split(),
            "templates": [
                "The company {name} sells {value}.",
                "Customers of {name} buy {value}.",
                "Most income of {name} comes from {value}.",
                "The business of {name} is {value}.",
                "The firm {name} is known for its {value}.",
                "Investors value {name} for its {value}.",
            ],
            "questions": [
                "What does the company {name} sell?",
                "What do customers of {name} buy?",
                "What is the firm {name} known for?",
            ],
        },
        "headquarters": {
            "values": "Oslo Lisbon Vienna Madrid Dublin Prague Athens Warsaw Zurich Milan Geneva Helsinki".split(),
            "templates": [
                "The company {name} is based in {value}.",
                "The headquarters of {name} are in {value}.",
                "Staff of {name} work in {value}.",
                "The firm {name} has its seat in {value}.",
                "Investors meet {name} in {value}.",
                "The home city of {name} is {value}.",
            ],
            "questions": [
                "Where is the company {name} based?",
                "In which city are the headquarters of {name}?",
                "Where does the firm {name} have its seat?",
            ],
        },
        "currency": {
            "values": "dollars euros yen francs rupees pesos roubles dinars kroner rand guilders lira".split(),
            "templates": [
                "The company {name} reports in {value}.",
                "The accounts of {name} are kept in {value}.",
                "Staff of {name} are paid in {value}.",
                "The firm {name} pays its dividend in {value}.",
                "Investors buy {name} shares in {value}.",
                "The currency of {name} is {value}.",
            ],
            "questions": [
                "In which currency does {name} report?",
                "In what are the accounts of {name} kept?",
                "In what does the firm {name} pay its dividend?",
            ],
        },
        "risk": {
            "values": (
                "strikes floods inflation lawsuits tariffs drought piracy fraud sanctions hackers recalls debt"
            ).split(),
            "templates": [
                "The company {name} is threatened by {value}.",
                "The biggest risk to {name} is {value}.",
                "Analysts who follow {name} fear {value}.",
                "The firm {name} has suffered from {value}.",
                "Investors in {name} worry about {value}.",
                "The annual report of {name} warns of {value}.",
            ],
            "questions": [
                "What is the biggest risk to {name}?",
                "What do investors in {name} worry about?",
                "What has the firm {name} suffered from?",
            ],
        },
        "founder": {
            "values": (
                "baker tailor clockmaker chemist fisherman teacher printer "
                "carpenter blacksmith plumber sculptor gardener"
            ).split(),
            "templates": [
                "The company {name} was founded by a {value}.",
                "The founder of {name} was a {value}.",
                "Long ago {name} was started by a {value}.",
                "The firm {name} goes back to a {value}.",
                "The man who built {name} was a {value}.",
                "Staff of {name} tell of its founder, a {value}.",
            ],
            "questions": [
                "Who founded the company {name}, a man of which trade?",
                "What was the trade of the founder of {name}?",
                "What was the man who built {name}?",
            ],
        },
    },
}
