"""English text of the lengths that a search or a chat brings, written for the demo."""

# Pairs whose similarity anyone can judge.
PAIRS = (
    ("A man is eating food.", "A man is eating a piece of bread."),
    ("How do I reset my password?", "I forgot my login and cannot get into my account."),
    ("The train to Oslo was late again.", "Rail services in Norway suffered delays."),
    ("A man is eating food.", "The committee postponed its vote on the budget."),
)

SENTENCES = (
    "How long does a letter to Lisbon take?",
    "The old lighthouse at the end of the harbour was switched off forty years ago, but every "
    "evening the keeper's granddaughter still walks out along the wall, climbs the ninety-one "
    "steps, and lights a small lamp in the window, because, as she says, the boats have become "
    "used to it and so has she.",
    "Where is my order?",
    "The meeting has been moved to Thursday at ten; the agenda stays as it was.",
    "Soak the beans overnight, throw the water away, and cook them slowly with an onion, two bay "
    "leaves and a spoon of oil until they are soft but still whole.",
    "Heavy rain is expected tonight in the western valleys, with up to sixty millimetres in "
    "places. Rivers will rise quickly. Drivers should avoid the pass until the afternoon, and "
    "campers near the water are asked to move to higher ground before dark; the shelters in the "
    "school and in the sports hall are open.",
    "Is this seat taken?",
    "She bought the bicycle from a neighbour who had never once ridden it.",
    "What is the difference between weather and climate?",
    "Our refund policy is simple: if an item does not suit you, send it back within thirty days "
    "in its original packaging and we return the full price, including what you paid for "
    "delivery. Items made to order, opened software and perishable goods are excluded, and a fee "
    "of five euros applies if the item comes back without the form that was in the parcel.",
    "Turn left at the bakery.",
    "The violinist tuned twice, nodded to the pianist, and began so quietly that people in the "
    "last row leaned forward.",
    "Battery drains fast after the update.",
    "Two thirds of the seats in the upper chamber are filled by election and the rest are appointed by the regions.",
    "In 1869 a chemist in Saint Petersburg wrote the known elements on cards, arranged them by "
    "weight, and noticed that their properties returned at regular intervals. He left gaps where "
    "the pattern asked for something that nobody had found, and said what the missing elements "
    "would be like. Within twenty years three of them had been discovered, and they were very "
    "nearly as he had described them.",
    "Does the museum open on Mondays?",
    "A loose wire behind the dashboard turned out to be the whole problem.",
    "Please find attached the signed contract together with both annexes; the originals follow by post.",
    "Thanks!",
    "The patient reports mild headaches in the morning for about two weeks, no fever, no change "
    "in vision, and little sleep. Blood pressure is slightly raised. Advised to keep a diary, to "
    "drink more water and less coffee, and to return if the pain becomes stronger or appears on "
    "one side.",
    "Which of these two cameras is better in low light?",
    "Snow fell on the blossoms and by noon it was gone.",
    "The compiler warns about an unused variable in line forty, but the real mistake is three "
    "lines above: the loop never ends when the list is empty.",
    "He plays chess by post with a man in Argentina whom he has never met.",
    "To plant a young tree, dig a hole twice as wide as the roots and no deeper than they are, "
    "loosen the soil at the sides, set the tree upright, fill in the earth by hand so that no air "
    "is left between the roots, and press it down gently with your foot. Water it well the same "
    "day, even if it is raining, and then once a week through the first summer.",
    "Prices rose by two per cent in March, less than analysts had expected.",
    "Can I bring my dog?",
    "The bridge carries forty thousand cars a day and was built for nine thousand.",
    "My grandmother's recipe says only: flour, enough water, salt, patience.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen; almost "
    "everything that we eat begins with it.",
    "After a long silence on the line the operator said that all flights to the islands had been "
    "cancelled, that nobody knew when they would start again, and that the hotel next to the "
    "station still had rooms, though not many, and certainly none with a view of the sea.",
    "Bus 14, then the red line to the last stop.",
    "Nobody in the village remembered who had painted the ceiling of the chapel.",
    "Could you recommend a quiet place to work near the university that has good light, does not "
    "close before eight, and where it is fine to stay for three hours with one coffee?",
    "Goal in the last minute!",
    "The new library stays open until midnight during the examinations.",
    "Ants find the shortest way to food without any of them knowing the map: each leaves a trace "
    "that fades, and on short paths the trace is renewed before it is gone.",
    "I would like to cancel my subscription at the end of the month.",
    "When the glacier pulled back last summer it uncovered a leather shoe, a wooden bowl and a "
    "bundle of arrows, all of them more than three thousand years old and in better condition "
    "than the fence that was put around them.",
    "Why is the sky dark at night?",
)
